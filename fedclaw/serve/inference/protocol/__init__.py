"""The Open Inference Protocol's messages: open_inference.proto and what protoc makes of it (checked in, reproducible).

They are in a descriptor pool of their own: other clients and servers of the protocol register the same names in the
process's one, and of two files that define a message protobuf takes the first alone.
"""

SERVICE = "inference.GRPCInferenceService"
