"""Bundles."""

from tests.export.conftest import home, image_bundle, image_run, table_bundle, table_run, table_source  # noqa: F401
