"""An unmodified Flower app: it imports nothing of FedClaw."""

import os

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

server_app = ServerApp()
client_app = ClientApp()
not_an_app = 3


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FedAvg(min_train_nodes=2, min_evaluate_nodes=2, min_available_nodes=2)
    start = ArrayRecord({"w": Array(np.zeros(4, dtype=np.float32))})
    result = strategy.start(grid=grid, initial_arrays=start, num_rounds=int(context.run_config["rounds"]))
    np.save(str(context.run_config["out"]), result.arrays["w"].numpy())


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Adds the site's step to the parameters; a site with more examples weighs more."""
    parameters = message.content["arrays"]["w"].numpy()
    parameters += float(context.node_config["step"])
    context.state["rounds"] = MetricRecord(
        {"done": context.state.metric_records.get("rounds", {"done": 0})["done"] + 1}
    )
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(parameters)}),
            "metrics": MetricRecord({"num-examples": int(context.node_config["examples"]), "loss": 1.0}),
        }
    )
    return Message(content, reply_to=message)


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    if os.environ.get("FAIL_EVALUATION"):
        raise RuntimeError("secret of the site")
    metrics = MetricRecord({"num-examples": 1, "accuracy": float(message.content["arrays"]["w"].numpy().mean())})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
