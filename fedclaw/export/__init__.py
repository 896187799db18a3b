"""From a finished run to a signed bundle that serves without torch, and back: export, verify, predict.

`layout` names what a bundle holds, `graph` and `parity` make and judge the model files, `statement` and `card`
say in words what it cost, `bundle` assembles and signs, `check` and `signature` verify, `predictor` runs it.
Only `graph` and `source` need torch; verification and prediction never import it.
"""
