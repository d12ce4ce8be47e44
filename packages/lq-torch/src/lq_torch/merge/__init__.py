"""Sibling Linear layers that take the same input, as one product."""

from lq_torch.merge.merge import merge_linears, refuse_merged, unmerge_linears

__all__ = ["merge_linears", "refuse_merged", "unmerge_linears"]
