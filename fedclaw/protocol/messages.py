"""The names of what a message holds, and of the stages of an exchange."""

# Records of a question.
ARRAYS, PLAN, TEACHER, BROADCAST = "arrays", "plan", "teacher", "sent"
# Records of an answer.
SUM, METRICS, RECEIPT, ABOUT = "sum", "metrics", "receipt", "about"
JSON = "json"
"""The entry of a configuration record that holds a frozen value."""
WEIGHT, EXAMPLES = "weight", "examples"
SCORES, SCORE_NOISE = "scores", "score_noise"
"""The record of histograms of scores, and the deviation of the noise in each of their cells."""
RUN, CHARGE = "run", "charge"
"""Entries of `ABOUT`: the run that a reply belongs to, and the hash of its charge in the site's ledger."""
HEADER_BYTES = 4 << 20
"""What an answer has at most beside the arrays that the plan asks for: metrics, receipt, names."""

KEYS, SHARES, CONFIRM, DISPUTE = "query.keys", "query.shares", "query.confirm", "query.dispute"
CONSENT, UNMASK = "query.consent", "query.unmask"
STAGES = (KEYS, SHARES, CONFIRM, DISPUTE, CONSENT, UNMASK)
"""Message types of a secure sum (`fedclaw.server.exchange`), in order."""
SECURE, MASKED = "secure", "masked"
"""What the protocol says, and the masked vector."""
