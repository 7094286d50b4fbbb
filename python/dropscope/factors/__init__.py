"""Per-sample gradients under every draw of the masks, as factors: captured once, used by every product."""

from __future__ import annotations

from dropscope.factors.allocation import ALLOCATIONS as ALLOCATIONS
from dropscope.factors.allocation import Allocation as Allocation
from dropscope.factors.blocks import Block as Block
from dropscope.factors.blocks import DenseBlock as DenseBlock
from dropscope.factors.blocks import FactorBlock as FactorBlock
from dropscope.factors.chunk import Chunk as Chunk
from dropscope.factors.plan import Plan as Plan
from dropscope.factors.plan import Route as Route
from dropscope.factors.store import CACHES as CACHES
from dropscope.factors.store import Cache as Cache
from dropscope.factors.store import Table as Table
