"""Search: a folder of images becomes an index, sentences find images in it.

:class:`Index` is the whole of it. Global vectors nominate, the model's head decides; see ``docs/search.md``.
"""

from .._index_options import CANDIDATE_BYTES, CANDIDATES, STORAGES
from .checking import Checked
from .hits import Hit, HitLists, Hits
from .index import Index
from .stopping import IndexingStoppedError
from .writing import Added

__all__ = [
    "CANDIDATES",
    "CANDIDATE_BYTES",
    "STORAGES",
    "Added",
    "Checked",
    "Hit",
    "HitLists",
    "Hits",
    "Index",
    "IndexingStoppedError",
]
