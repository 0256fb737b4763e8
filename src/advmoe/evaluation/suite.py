"""The former home of the attacks."""

raise ImportError("advmoe.evaluation.suite is now advmoe.attacks.registry (ATTACKS, Attack) and advmoe.attacks.presets (PRESETS)")
