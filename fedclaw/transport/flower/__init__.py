"""FedClaw's federation as a Flower app: on a stock SuperLink and SuperNodes, or on Flower's simulation engine.

    fedclaw.transport.flower.server:app    the ServerApp: FedClaw's own rounds over Flower's Grid
    fedclaw.transport.flower.client:app    the ClientApp: the site that the node's configuration names

Flower numbers its nodes anew each time they connect, gives each message an identity of its own, and may answer each
message in another process. FedClaw's rounds need names that last and questions that are the same when they are asked
again. So a site says its name when it is first met (`NAME`), and every question carries the identity that FedClaw
gave it (`NOTE`); under it the site pays, keeps its answer, and gives the same answer again at no further cost.
"""

NAME = "query.name"
"""Message type: who are you? Answered with the site's name in the record `NOTE`, without opening its data."""
NOTE = "flower"
"""The configuration record that travels beside a question or an answer."""
IDENTITY, SITE = "identity", "site"
