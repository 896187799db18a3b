"""Hydra launchers and a sweeper on the libraries as they are today; Hydra finds them by the name of this package.

hydra_plugins is a namespace that packages share, so it has no __init__.py.
"""
