"""Opening what a recipe reads: shard sets with its settings for storage, and the stream of its training samples."""

from __future__ import annotations

from vlm.data.mix import parse_mix
from vlm.data.shards import ShardSet
from vlm.data.stream import Source, Stream
from vlm.recipe import Recipe, TrainData


def open_shards(data: TrainData, path: str) -> ShardSet:
    """A shard set with the cache and the patience that a recipe asks for."""
    return ShardSet(path, cache=data.cache, cache_bytes=data.cache_bytes, retries=data.retries)


def open_stream(recipe: Recipe) -> Stream:
    """The training samples of a recipe."""
    sources = [Source(open_shards(recipe.data, path), weight) for path, weight in parse_mix(recipe.data.shards)]
    return Stream(sources, recipe.seed, recipe.inputs, recipe.data.pack_length)
