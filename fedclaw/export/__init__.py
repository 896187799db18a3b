"""From a finished run to a signed bundle that serves without torch, and back: export, verify, predict.

`layout` names the files of a bundle. `graph` writes the model files and compares them with the torch model.
`statement` and `card` say in words what training cost. `bundle` assembles and signs, `check` and `signature` verify,
`predictor` predicts. Only `graph` needs torch: verification and prediction never import it.
"""
