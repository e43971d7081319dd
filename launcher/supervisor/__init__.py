"""One attempt of one stage: start its steps, watch them, stop them when asked, say how it ended, seal the artifact.

`python -m launcher.supervisor STAGE_JSON`. Standard library only.
"""
