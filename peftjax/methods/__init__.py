"""The methods: a file each, its formula and its rules."""
