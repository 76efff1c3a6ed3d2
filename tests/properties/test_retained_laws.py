"""The tree of states against the naive thing: a list that is searched from end to end."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rollout.engines.embedded.prefix_tree import PrefixTree, shared_count
from rollout.engines.embedded.retained import RetainedStates
from rollout.engines.kept_state import TOKEN_BYTES, KeptState

BYTES_MAX = 400
TOKENS = st.lists(st.sampled_from([0, 1, 256]), min_size=1, max_size=7).map(
    lambda ids: b"".join(id_.to_bytes(TOKEN_BYTES, "little") for id_ in ids)
)
WEIGHTS = st.sampled_from([("old",), ("new",), ("old", "new")])
SESSIONS = st.sampled_from(["a", "b", "c"])


@given(TOKENS, TOKENS)
def test_shared_tokens_are_counted_as_one_would_count_them(first: bytes, second: bytes) -> None:
    count = 0
    while first[: 4 * count + 4] == second[: 4 * count + 4] and 4 * count < min(len(first), len(second)):
        count += 1
    assert shared_count(first, second) == count


@given(st.lists(st.tuples(st.booleans(), TOKENS), max_size=60), TOKENS)
@settings(max_examples=300)
def test_a_tree_finds_what_a_list_finds(changes: list[tuple[bool, bytes]], asked: bytes) -> None:
    tree, kept = PrefixTree[bytes](), set[bytes]()
    for is_put, tokens in changes:
        if is_put:
            tree.node(tokens).value = tokens
            kept.add(tokens)
        elif tokens in kept:
            node, _ = tree.find(tokens)
            assert node is not None
            tree.remove(node)
            kept.discard(tokens)
        found, known_count = tree.find(asked)
        best = max((each for each in kept if asked.startswith(each)), key=len, default=None)
        assert (found.value if found else None) == best
        assert known_count == max((shared_count(asked, each) for each in kept), default=0)
        assert _places(tree) <= max(0, 2 * len(kept) - 1), "nothing stays of what was taken out"


def _places(tree: PrefixTree[bytes]) -> int:
    waiting, count = [*tree.root.children.values()], 0
    while waiting:
        node = waiting.pop()
        count += 1
        waiting += node.children.values()
    return count


class Retained(RuleBasedStateMachine):
    """States come, are found and go; the model holds every state that was ever put, and who put it."""

    def __init__(self) -> None:
        super().__init__()
        self.evicted: list[KeptState] = []
        self.states = RetainedStates(BYTES_MAX, self.evicted.append)
        self.put: list[KeptState] = []
        self.owned: dict[str, KeptState] = {}

    @rule(tokens=TOKENS, weights=WEIGHTS, session=SESSIONS, is_own=st.booleans())
    def keep(self, tokens: bytes, weights: tuple[str, ...], session: str, *, is_own: bool) -> None:
        is_own = is_own or len(weights) > 1
        name = session if is_own else ""
        if not self.states.claim(tokens, weights, name):
            entry = KeptState("build", weights, tokens, bytearray(len(tokens) * 5))
            self.states.put(entry, name)
            self.put.append(entry)
        if is_own:
            self.owned[session] = KeptState("build", weights, tokens, bytearray(len(tokens) * 5))

    @rule(session=SESSIONS)
    def release(self, session: str) -> None:
        self.states.release(session)
        self.owned.pop(session, None)
        assert self.states.own(session) is None

    @rule(tokens=TOKENS, digest=st.sampled_from(["old", "new"]))
    def find(self, tokens: bytes, digest: str) -> None:
        there = [each for each in self.put if self.states.claim(each.tokens, each.weights)]
        found, known_count = self.states.longest_prefix(tokens, digest)
        fits = [
            each
            for each in there
            if each.weights == (digest,) and len(each.tokens) < len(tokens) and tokens.startswith(each.tokens)
        ]
        assert (found.tokens if found else b"") == max((each.tokens for each in fits), key=len, default=b"")
        assert known_count * TOKEN_BYTES >= len(found.tokens if found else b"")
        assert known_count * TOKEN_BYTES < len(tokens)

    @rule(session=SESSIONS)
    def go_on(self, session: str) -> None:
        own = self.states.own(session)
        assert own is None or (own.tokens, own.weights) == (self.owned[session].tokens, self.owned[session].weights)

    @invariant()
    def bytes_are_bounded_and_counted(self) -> None:
        assert 0 <= self.states.bytes_held <= BYTES_MAX
        assert (self.states.bytes_held == 0) == (len(self.states) == 0)
        assert [each for each in self.evicted if len(each.weights) != 1] == [], "others are of no use to anybody else"


TestRetained = Retained.TestCase
TestRetained.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


def state(*ids: int) -> KeptState:
    tokens = b"".join(id_.to_bytes(TOKEN_BYTES, "little") for id_ in ids)
    return KeptState("build", ("w",), tokens, bytearray(100 - len(tokens)))


def test_what_is_spare_goes_first_and_what_was_used_longest_ago_next() -> None:
    evicted: list[KeptState] = []
    states = RetainedStates(500, evicted.append)
    former, newest = state(1, 2), state(1, 2, 3, 4)
    states.put(former, "live")
    states.put(state(1, 2, 3))
    states.put(newest, "live")
    states.put(state(9), "ended")
    states.release("ended")
    assert [each.tokens[::TOKEN_BYTES] for each in states] == [bytes((1, 2, 3)), bytes((9,)), bytes((1, 2, 3, 4))]
    assert states.claim(former.tokens, ("w",)), "kept as long as there is room"
    for number in (5, 6):
        states.put(state(number), "live" + str(number))
    assert [each.tokens[0] for each in states] == [9, 1, 1, 5, 6], "the place of a former turn went first"
    states.put(state(7), "live 7")
    assert not evicted, "of spare ones nobody is told"
    states.put(state(8), "live 8")
    assert evicted == [newest], "the one used longest ago"
    assert states.own("live") is None


def test_a_place_that_somebody_went_on_from_is_not_spare() -> None:
    states = RetainedStates(300)
    for ids in ((1,), (2,)):
        states.put(state(*ids))
    assert states.longest_prefix(state(1, 2).tokens, "w")[0] == state(1)
    states.put(state(3))
    states.put(state(4))
    assert [each.tokens[0] for each in states] == [3, 4, 1]


def test_turns_of_many_sessions_push_out_none_of_them() -> None:
    evicted: list[KeptState] = []
    states = RetainedStates(11 * 100, evicted.append)
    for turn in range(1, 6):
        for session in range(10):
            line = (session, *range(2 * turn))
            states.put(state(*line[:-1]))
            states.put(state(*line), str(session))
            assert len(states) <= 11
    assert not evicted
    assert [session for session in range(10) if not states.own(str(session))] == []
