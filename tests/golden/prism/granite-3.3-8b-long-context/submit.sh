#!/bin/bash
# Made by prism-launch render: run prism-granite-3.3-8b-long-context for cluster example-pyxis.
# Submits every stage after those it reads; when one fails for good, those behind it are cancelled.
# shellcheck disable=SC2016
{
    echo 'submit.sh: rendered to be read; this cannot be run as it is:'
    echo 'stage prepare: not built yet: sources of kind dataset (dclm-edu, chat, nemotron-math, mot-math, megamath-web-pro, mot-code, opencodereasoning-2, refinecode, starcoder2, dclm-edu-long, nemotron-math-long, megamath-web-pro-long, starcoder2-long, xenarcai-codex)'
} >&2
exit 2
