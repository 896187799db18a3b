"""A site's typed no, with its reason."""

from enum import IntEnum


class RefusalCode(IntEnum):
    """Why a site will not take part; the codes lie outside Flower's own."""

    MALFORMED = 2000
    FEDERATION = 2001
    WORKLOAD = 2002
    SCHEMA = 2003
    MODEL = 2004
    STRATEGY = 2005
    PRIVACY_REQUIRED = 2006
    EPSILON = 2007
    BUDGET = 2008
    COHORT = 2009
    LOCAL_STEPS = 2010
    METRICS = 2011
    UPDATE_SIZE = 2012
    SECURE_AGGREGATION = 2013
    FREQUENCY = 2014
    STATISTICS = 2015
    SLOW = 2016
    """Said by the server in the place of a site whose answer came too slowly."""
    FAILED = 2099
    """The site tried and failed; the reason is in its own log, not on the wire."""


class Refusal(Exception):
    """A typed no from a site, with its reason. Raised at the site, sent as a Flower `Error`."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
