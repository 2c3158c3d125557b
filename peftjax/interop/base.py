"""The model that an adapter is for, as torch would call its parts, and what an adapter's options choose in it."""

import dataclasses
import re
from typing import Any, Iterable, Mapping, Sequence

from peftjax.flat import near
from peftjax.interop.match import saved, targeted
from peftjax.interop.names import Spot
from peftjax.interop.turning import Rope


# What torch calls the table of words, where a model looks up other tables too.
WORDS = ("word_embeddings", "embed_tokens", "wte", "shared", "tok_embeddings", "word_embedding", "words")


@dataclasses.dataclass(frozen=True)
class Base:
    """The parameters of a model by their torch names, and what they do not show of its attention.

    Attributes:
      spots: the parameters.
      rope: how rotary positions turn keys, as `turning.turned` reads it.
      heads: into how many heads keys are cut.
    """

    spots: Mapping[str, Spot]
    rope: Rope = None
    heads: int | None = None

    @property
    def modules(self) -> list[str]:
        """The names of the modules that have parameters."""
        return list(dict.fromkeys(spot.module for spot in self.spots.values()))

    def nearest(self, entry: str, modules: Iterable[str] | None = None) -> str:
        """The modules whose names, or their ends, are most like an entry of a configuration, for an error message."""
        paths = [module.replace(".", "/") for module in (self.modules if modules is None else modules)]
        return near(entry.replace(".*", "").replace(".", "/"), paths).replace("/", ".")

    def at(self, path: str) -> list[Spot]:
        """The parameters that one leaf holds."""
        return [spot for spot in self.spots.values() if spot.path == path]

    def targeted(self, options: Mapping[str, Any]) -> list[str]:
        """The modules that `target_modules` and its companions name.

        Raises:
          ValueError: they name none.
        """
        hit = [module for module in self.modules if targeted(module, options)]
        if not hit:
            wanted = options["target_modules"]
            last = wanted if isinstance(wanted, str) else (wanted or [""])[0]
            raise ValueError(
                f"target_modules={wanted!r} names no module of this model (nearest: {self.nearest(last)}); does "
                "`names` map its leaves to the torch names?"
            )
        return hit

    def kernels(self, options: Mapping[str, Any]) -> list[Spot]:
        """The kernels of these modules.

        Raises:
          ValueError: a module has none, or there are no modules.
        """
        hit = set(self.targeted(options))
        found = [spot for spot in self.spots.values() if spot.is_kernel and spot.module in hit]
        if bare := hit - {spot.module for spot in found}:
            raise ValueError(f"target_modules names {', '.join(sorted(bare)[:5])}, which have no kernel")
        return found

    @property
    def norms(self) -> set[str]:
        """The modules that have a scale and no kernel."""
        scales = {spot.module for spot in self.spots.values() if spot.role.op == "scale"}
        return scales - {spot.module for spot in self.spots.values() if spot.is_kernel}

    def words(self, what: str) -> Spot:
        """The table of words: the only one that is looked up, or the only one of a usual name.

        Raises:
          ValueError: there is none, or more than one.
        """
        tables = [spot for spot in self.spots.values() if spot.role.op == "embedding" and "gather" in spot.role.uses]
        named = [spot for spot in tables if spot.module.rpartition(".")[2] in WORDS]
        found = tables if len(tables) == 1 else named
        if len(found) != 1:
            said = ", ".join(spot.name for spot in named or tables) or "no table"
            raise ValueError(
                f"{what} go with the table of words, and this model looks up {said}; expected one, or one called "
                f"{', '.join(WORDS)}: does `names` map its leaves to the torch names?"
            )
        return found[0]

    def saved(self, modules: Iterable[str] | None) -> list[Spot]:
        """The parameters of the modules that `modules_to_save` names."""
        return [spot for spot in self.spots.values() if saved(spot.module, modules or ())]

    def leaves(self, chosen: Iterable[Spot], why: str) -> list[str]:
        """The paths of some parameters' leaves.

        Raises:
          ValueError: some parameters of a stacked leaf are chosen and others are not.
        """
        names = {spot.name: spot.path for spot in chosen}
        paths = list(dict.fromkeys(names.values()))
        for path in paths:
            if left := [spot.name for spot in self.at(path) if spot.name not in names]:
                raise ValueError(f"{path} stacks several parameters; {why} names some of them, but not {left[0]}")
        return paths


def regex(paths: Sequence[str]) -> str:
    """The pattern that names these leaves and no others."""
    return "|".join(map(re.escape, paths))
