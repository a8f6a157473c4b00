"""The prefix cache's bookkeeping: what is found, what is evicted, what never is."""

import pytest

from service.worker.generation.prefix_cache import CHUNK, Block, PrefixCache, whole_chunks


def ids(*numbers: int, rest: int = 0) -> list[int]:
    """A chunk of each number, and `rest` tokens more."""
    return [number for number in numbers for _ in range(CHUNK)] + [99] * rest


def insert(cache: PrefixCache, *numbers: int) -> list[Block]:
    """The chain of blocks for `numbers`, as a prompt makes it: it holds the block it stands on."""
    chain = [cache.root]
    for tokens in whole_chunks(ids(*numbers)):
        cache.hold(chain[-1])
        block, _ = cache.insert(chain[-1], tokens)
        cache.release(chain[-1])
        assert block is not None
        chain.append(block)
    return chain[1:]


def found(cache: PrefixCache, *numbers: int) -> list[Block]:
    return cache.find(whole_chunks(ids(*numbers)))


@pytest.mark.parametrize(("rest", "expected"), [(0, 2), (1, 2), (CHUNK - 1, 2), (CHUNK, 3)])
def test_only_whole_chunks_count(rest: int, expected: int) -> None:
    assert len(whole_chunks(ids(1, 2, rest=rest))) == expected


def test_the_longest_common_beginning_is_found() -> None:
    cache = PrefixCache(8)
    chain = insert(cache, 1, 2, 3)
    assert found(cache, 1, 2, 3) == chain
    assert found(cache, 1, 2, 4) == chain[:2]
    assert found(cache, 1, 2) == chain[:2]
    assert found(cache, 2, 3) == []  # equal tokens behind other ones are another block


def test_what_is_known_is_not_stored_twice() -> None:
    cache = PrefixCache(8)
    first, second = insert(cache, 1, 2), insert(cache, 1, 3)
    assert first[0] is second[0]
    assert cache.num_used == 3
    assert cache.insert(cache.root, whole_chunks(ids(1))[0]) == (first[0], False)


def test_blocks_have_places_of_their_own_within_the_pool() -> None:
    cache = PrefixCache(4)
    assert sorted(block.index for block in [*insert(cache, 1, 2), *insert(cache, 3, 4)]) == [0, 1, 2, 3]


def test_the_leaf_longest_without_use_makes_room() -> None:
    cache = PrefixCache(3)
    insert(cache, 1), insert(cache, 2), insert(cache, 3)
    cache.use(found(cache, 1))
    insert(cache, 4)
    assert [bool(found(cache, number)) for number in (1, 2, 3, 4)] == [True, False, True, True]
    assert cache.num_used == 3


def test_a_parent_outlives_its_children() -> None:
    cache = PrefixCache(3)
    insert(cache, 1, 2), insert(cache, 3)
    cache.use(found(cache, 3))
    insert(cache, 4)  # block (1) is the oldest, but (1, 2) stands on it
    assert (len(found(cache, 1, 2)), len(found(cache, 3)), len(found(cache, 4))) == (1, 1, 1)
    insert(cache, 5)
    assert len(found(cache, 1, 2)) == 0


def test_finding_alone_keeps_nothing_young() -> None:
    cache = PrefixCache(2)
    insert(cache, 1), insert(cache, 2)
    found(cache, 1)
    insert(cache, 3)
    assert (found(cache, 1), len(found(cache, 2))) == ([], 1)


def test_what_a_prompt_stands_on_is_never_evicted_and_then_there_may_be_no_room() -> None:
    cache = PrefixCache(1)
    (block,) = insert(cache, 1)
    cache.hold(block)
    assert cache.insert(cache.root, whole_chunks(ids(2))[0]) == (None, False)
    cache.release(block)
    assert len(insert(cache, 2)) == 1
    assert found(cache, 1) == []


def test_without_blocks_nothing_is_kept() -> None:
    cache = PrefixCache(0)
    assert cache.insert(cache.root, whole_chunks(ids(1))[0]) == (None, False)
    assert cache.find(whole_chunks(ids(1))) == []
