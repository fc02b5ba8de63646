"""YAML of plain values: nothing in it is executed, and no key in it is silently overruled."""

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice; keep one", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


def parse(text: str) -> Any:
    """The value in `text`. Raises ValueError for what is no YAML of plain values."""
    try:
        # A SafeLoader: of Python it makes numbers, texts, dates, lists and dictionaries only.
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # Its own errors, and of "2024-13-01", "!!int x" or "!!bool x" whatever Python says to them.
    except Exception as error:
        raise ValueError(str(error)) from None
