"""Print Chutes' catalogue as entries for a file of models; `script/models` runs it.

The address is that of the settings: CATALOGUE_URL and CHUTE_URL, in the environment or `.env`.
"""

import argparse
import difflib
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import config
import models
from catalogue import CatalogueError, Reader


def entry(model: models.Model) -> str:
    """Return what is known of a model's name, address, fields, images and prompt, as TOML."""
    lines = [f"[{key(model.name)}]", f"url = {value(model.url)}"]
    if model.images:
        lines.append(f"images = {value(model.images.model_dump())}")
    if length := model.prompt.model_dump(exclude_none=True):
        lines.append(f"prompt = {value(length)}")
    if model.fields is not None:
        lines += ["", f"[{key(model.name)}.fields]"]
        rules = models.rules(model.fields).items()
        lines += [f"{key(name)} = {value(rule)}" for name, rule in rules]
    return "\n".join(lines) + "\n"


def key(name: str) -> str:
    """Return a key as TOML writes it."""
    return name if re.fullmatch("[A-Za-z0-9_-]+", name) else value(name)


def value(found: Any) -> str:
    """Return a value as TOML writes it; it knows no null, which is left out."""
    if isinstance(found, dict):
        pairs = [f"{key(name)} = {value(v)}" for name, v in found.items() if v is not None]
        return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
    if isinstance(found, list):
        return f"[{', '.join(value(each) for each in found if each is not None)}]"
    # JSON's words are TOML's, but for one character.
    return json.dumps(found, ensure_ascii=False).replace("\x7f", "\\u007f")


def differences(
    kept: dict[str, models.Model], found: dict[str, models.Model], file: Path
) -> Iterator[str]:
    """Yield what differs between the models of the file and those of the catalogue."""
    for name in sorted(kept.keys() | found.keys()):
        old, new = (
            entry(known[name]).splitlines() if name in known else [] for known in (kept, found)
        )
        names = f"{file}: {name}", f"catalogue: {name}"
        yield from difflib.unified_diff(old, new, *names, n=len(old), lineterm="")


def main() -> None:
    """Print the entries or the difference; exit with one line on stderr where that fails."""
    parser = argparse.ArgumentParser(prog="script/models", description=__doc__)
    parser.add_argument("--diff", action="store_true", help="compare them with MODELS_FILE")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `script/models | head` is no fault.
    wants_diff = parser.parse_args().diff
    try:
        # The catalogue is public: no token is needed, nor sent.
        settings = config.load({"CHUTES_API_TOKEN": "none", **os.environ})
        if not settings.catalogue_url:
            sys.exit("CATALOGUE_URL is off: give an address, as in CATALOGUE_URL=... script/models")
        found = {m.name: m for m in Reader().read(settings.catalogue_url, settings.chute_url)}
    except (config.ConfigError, CatalogueError) as error:
        sys.exit(str(error))
    if wants_diff:
        kept = {model.name: model for model in settings.file_models.values()}
        for line in differences(kept, found, settings.models_file):
            print(line)
    else:
        print("\n".join(entry(model) for model in found.values()), end="")


if __name__ == "__main__":
    main()
