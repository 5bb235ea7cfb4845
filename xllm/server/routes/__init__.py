"""The endpoints. A new one is one file with a `router`, and its name in the table."""

from importlib import import_module

from fastapi import APIRouter

ROUTES = ("completions", "chat", "models", "tokenize", "health", "metrics")


def routers() -> list[APIRouter]:
    return [import_module(f"{__name__}.{name}").router for name in ROUTES]
