"""Search spaces: read from YAML, checked, and used to suggest the settings of a trial."""

from typing import TYPE_CHECKING

from tune_amp.doors import open_door

if TYPE_CHECKING:
    from tune_amp.space.space import SearchSpace as SearchSpace
    from tune_amp.space.space import load_space as load_space
    from tune_amp.space.space import parse_space as parse_space

__getattr__ = open_door(__name__, space=("SearchSpace", "load_space", "parse_space"))
