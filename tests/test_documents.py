"""Whoever pastes the shell lines of the documents, one after the other, sees what these say."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from server import checkout
from simulator import Simulator
from upstream import closed_port, local_models, serving

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "docs/api.md", "docs/troubleshooting.md")
# The demo runs until Ctrl-C, the server for as long as the lines after it.
PRELUDE = r"""
set -eu
curl() {
    rm -f head
    code=0
    command curl --noproxy '*' -sS -D head "$@" || code=$?
    echo "$code $(grep -a '^HTTP' head | tail -n 1 | cut -d ' ' -f 2) $*" >>calls
    return $code
}
sh() {
    command sh "$@" >"${1#script/}.log" 2>&1 &
    case "$1" in
    script/demo) said="The picture is there" url= ;;
    script/server) said= url=http://localhost:$PORT/healthz ;;
    esac
    for _ in $(seq 200); do
        kill -0 $!
        if [ -n "$url" ]; then
            ! command curl --noproxy '*' -sf "$url" >health || break
        else
            ! grep -q "$said" demo.log || break
        fi
        sleep 0.1
    done
    if [ -n "$url" ]; then
        server=$!
        trap 'kill $server; wait $server || true' EXIT
    else
        kill $!
        wait $!
    fi
}
"""


def shell_lines(document):
    """Return blocks of shell lines, and single ones in the text, each with the answer after it."""
    text = (ROOT / document).read_text()
    block = r"^```sh\n(?P<block>.*?)^```\n(?:\n```(?:json)?\n(?P<answer>.*?)^```)?"
    inline = r"`(?P<line>curl [^`]*(?:localhost|\$URL)[^`]*)`"
    return [
        ((found["block"] or found["line"]).strip(), found["answer"])
        for found in re.finditer(f"{block}|{inline}", text, re.M | re.S)
    ]


def alike(answer):
    """Return an answer without what differs from one time to the next."""
    for pattern in (r"[0-9a-f]{8}-[-0-9a-f]{27}", r"[0-9a-f]{64}", r'(?<=")/\S*(?=/)', r"[\d.]+"):
        answer = re.sub(pattern, "#", answer)
    return answer.strip()


@pytest.fixture
def folder(tmp_path):
    """Return a copy of the project, in which the packages are."""
    folder = checkout(tmp_path / "project")
    shutil.copytree(ROOT / "script", folder / "script")
    shutil.copy(ROOT / ".env.example", folder)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    (folder / "script" / "bootstrap").write_text("#!/bin/sh\n")
    return folder


@pytest.mark.processes
def test_every_shell_line_does_what_it_says(folder):
    port = closed_port()
    lines = [line for document in DOCUMENTS for line in shell_lines(document)]
    script = [PRELUDE]
    for n, (line, _) in enumerate(lines):
        script.append(f"exec >answer-{n}\n{line.replace('localhost:3000', f'localhost:{port}')}\n")
    with serving(Simulator(latency=0.2)) as chutes:
        (folder / "models.toml").write_text(local_models(chutes.url))
        environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "PORT": str(port)}
        environ["CHUTES_API_URL"] = chutes.url
        ended = subprocess.run(
            ["bash", "-c", "\n".join(script)],
            cwd=folder,
            env=environ,
            stderr=subprocess.PIPE,
            text=True,
            timeout=80,
            check=False,
        )
    assert ended.returncode == 0, ended.stderr
    calls = (folder / "calls").read_text().splitlines()
    assert len(calls) > 30
    refused = [call for call in calls if not re.match("0 2", call)]
    assert len(refused) == 1 and refused[0].startswith("0 400 ") and '"width": 64' in refused[0]
    answers = 0
    for n, (line, answer) in enumerate(lines):
        if answer:
            answers += 1
            said = (folder / f"answer-{n}").read_text()
            assert alike(said) == alike(answer), line
    assert answers >= 5
