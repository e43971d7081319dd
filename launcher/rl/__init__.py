"""RL backends: what each supports and the components it runs."""
