"""The product's own ClientApp."""

from fedsb.client_app import app

__all__ = ["app"]
