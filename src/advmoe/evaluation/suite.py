"""The old name of advmoe.attacks.registry and advmoe.attacks.presets."""

raise ImportError("advmoe.evaluation.suite is now advmoe.attacks.registry (ATTACKS, Attack) and advmoe.attacks.presets (PRESETS)")
