"""Settings in few words, for legends."""

from collections.abc import Mapping, Sequence


def label_of(settings: Mapping[str, str], keys: Sequence[str]) -> str:
    """`fedavg, epsilon 2` for strategy=fedavg privacy.epsilon=2.

    A key by its last word, where that tells it from the others. What chooses a group of settings, and not a number,
    speaks for itself.
    """
    short = {key: key.rpartition(".")[2] for key in keys}
    ambiguous = {word for word in short.values() if list(short.values()).count(word) > 1}
    words = []
    for key in keys:
        value = settings.get(key, "")
        name = key if short[key] in ambiguous else short[key].replace("_", " ")
        chosen = "." not in key and not _is_number(value)
        words.append(value if chosen and value else f"{name} {value or 'as set'}")
    return ", ".join(words)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text in ("true", "false", "null")
    return True
