"""FedClaw's federation as a Flower app: on a stock SuperLink and SuperNodes, or on Flower's simulation engine.

    fedclaw.transport.flower.server:app    the ServerApp: FedClaw's own rounds over Flower's Grid
    fedclaw.transport.flower.client:app    the ClientApp: the site that the node's configuration names

Flower numbers its nodes anew each time they connect, gives each message an identity of its own, and may answer each
message in another process. FedClaw's rounds need names that last and questions that are the same when they are asked
again. So a new node is asked for its site's name (`NAME_QUERY`), and every question carries the identity that FedClaw
gave it (in the record `FLOWER_RECORD`). Under it the site pays, stores its answer, and repeats it at no cost.
"""

NAME_QUERY = "query.name"
"""Message type that asks for a site's name; answered in `FLOWER_RECORD`, without opening the site's data."""
FLOWER_RECORD = "flower"
"""The configuration record that is added to a question or an answer on Flower's runtimes."""
IDENTITY, SITE = "identity", "site"
