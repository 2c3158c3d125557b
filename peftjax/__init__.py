"""Fine-tunes a small part of any pretrained JAX model: functions of parameter pytrees, unchanged."""
