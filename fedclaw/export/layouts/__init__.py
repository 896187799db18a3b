"""A verified bundle laid out for a standard server: Triton, KServe, MLflow, OpenVINO.

Each is written from the very bytes that were verified, whole or not at all, and holds beside its model the signed rest
of the bundle (`signed/`): the digest of the model's file is in there, under the federation's signature.
"""
