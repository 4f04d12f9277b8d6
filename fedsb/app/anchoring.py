"""Where the relative paths of a configuration lead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedsb.config.schema import Config


def anchored(config: Config, folder: Path) -> Config:
    """Resolve relative paths of data, model and output against ``folder``; hub ids stay as they are.

    Under Flower the process that reads a configuration does not stand where its user does.
    """

    def absolute(value: str | None) -> str | None:
        return str(folder / value) if value and (folder / value).exists() else value

    data = replace(
        config.data,
        path=absolute(config.data.path),
        test_path=absolute(config.data.test_path),
        public_path=absolute(config.data.public_path),
        validation_path=absolute(config.data.validation_path),
    )
    model = replace(config.model, name=absolute(config.model.name) or "") if config.model.kind == "pretrained" else config.model
    model = replace(model, tokenizer=absolute(model.tokenizer))
    output, resume = (None if path is None else str(folder / path) for path in (config.output, config.resume))
    keys = config.federation.node_keys
    federation = replace(config.federation, node_keys=str(folder / keys) if keys else None)
    return replace(config, data=data, model=model, federation=federation, output=output, resume=resume)
