#!/bin/bash
# Made by prism-launch render: run prism-nemotron-h-8b for cluster example-pyxis.
# Submits every stage after those it reads; when one fails for good, those behind it are cancelled.
# shellcheck disable=SC2016
{
    echo 'submit.sh: rendered to be read; this cannot be run as it is:'
    echo 'stage prepare: not built yet: sources of kind dataset (dclm-edu, chat, nemotron-math, mot-math, megamath-web-pro, mot-code, opencodereasoning-2, refinecode, starcoder2, openthoughts3-science, mot-science) and published problem sets (rl-balanced, aime24, aime25, math500, livecodebench, codeforces, gpqa-diamond)'
    echo 'stage rl: not built yet: our reward as an environment of NeMo-RL, waiting for all of Ray'"'"'s workers, and the worker that reports NeMo-RL'"'"'s progress and takes over its checkpoint'
    echo 'stage evaluate-math: not built yet: several samples a problem (samples) and sampling from the likeliest words alone (top_p)'
    echo 'stage evaluate-code: not built yet: several samples a problem (samples) and sampling from the likeliest words alone (top_p)'
    echo 'stage evaluate-science: not built yet: several samples a problem (samples) and sampling from the likeliest words alone (top_p)'
} >&2
exit 2
