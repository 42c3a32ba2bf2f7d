"""The routes of models: what may be asked for, and what each one takes."""

from flask import Blueprint, Response

import models
from db import stamp
from models import Model
from web import answers
from web.openapi import operation
from web.params import get_model_or_404
from web.service import service

bp = Blueprint("models", __name__)


@bp.get("/models")
@operation(answers.Models, id="models")
def list_models() -> Response:
    """List the models."""
    defaults = _default_names()
    shown = [_show(model, *defaults) for model in service.registry.known()]
    return answers.Models(models=shown, catalogue=_catalogue()).response()


@bp.get("/models/<path:name>")
@operation(answers.Model, errors=(404,), id="model")
def get_model(name: str) -> Response:
    """Look at a model, by any of its names."""
    return _show(get_model_or_404(name), *_default_names()).response()


def _default_names() -> tuple[str, str]:
    find, config = service.registry.find, service.config
    return find(config.default_model).name, find(config.default_edit_model).name


def _show(model: Model, default: str, default_edit: str) -> answers.Model:
    fields = None if model.fields is None else models.rules(model.fields)
    return answers.Model(
        name=model.name,
        aliases=model.aliases,
        source=model.source,
        default=model.name == default,
        default_edit=model.name == default_edit,
        fields=fields,
        send=model.send,
        prompt=model.prompt.model_dump(exclude_unset=True),
        images=model.images.maximum if model.images else 0,
        hot=model.hot,
        usd_per_hour=model.usd_per_hour,
    )


def _catalogue() -> answers.Catalogue | None:
    if not service.config.catalogue_url:
        return None
    state = service.database.catalogue_state()
    read_at = None if state.read_at is None else stamp(state.read_at)
    return answers.Catalogue(read_at=read_at, error=state.error)
