"""Which prefixes a server still holds: a radix tree of whole pages; the coldest leaf goes first."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from itertools import count

from backends.engine.prompts import Prompt


class Node:
    """An edge of the tree and what hangs below it."""

    __slots__ = ("alive", "children", "key", "locks", "parent", "tokens", "used")

    def __init__(self, key: Prompt | None, parent: Node | None, used: int) -> None:
        self.key = key
        self.tokens = key.tokens if key is not None else 0
        self.parent = parent
        self.children: dict[Hashable, Node] = {}
        self.locks = 0
        self.used = used
        self.alive = True


class PrefixCache:
    """Counts tokens only: `tokens` held, of which `protected` belong to live requests."""

    def __init__(self, page: int) -> None:
        self._page = page
        self._ticks = count(1)
        self.clear()

    def clear(self) -> None:
        self._roots: dict[Hashable, Node] = {}
        self._cold: list[tuple[int, int, Node]] = []
        self._pushes = count()
        self._nodes = 0
        self.tokens = 0
        self.protected = 0

    @property
    def evictable(self) -> int:
        return self.tokens - self.protected

    def match(self, space: str, prompt: Prompt, limit: int) -> tuple[Node, int]:
        """The deepest node that the prompt's first `limit` tokens reach, and how many it covers."""
        node = self._root(space, prompt)
        matched = 0
        rest = prompt.cut(0, self._aligned(min(limit, prompt.tokens)))
        while rest.tokens:
            child = node.children.get(rest.head(self._page))
            if child is None or child.key is None:
                break
            shared = self._aligned(child.key.common(rest))
            node = child if shared == child.tokens else self._split(child, shared)
            self._touch(node)
            matched += shared
            if node is not child:
                break
            rest = rest.cut(shared, rest.tokens)
        return node, matched

    def insert(self, space: str, prompt: Prompt) -> tuple[Node, int]:
        """Hold the prompt's whole pages; answers its node and how many tokens were new."""
        whole = prompt.cut(0, self._aligned(prompt.tokens))
        node, matched = self.match(space, whole, whole.tokens)
        fresh = whole.tokens - matched
        if fresh == 0:
            return node, 0
        leaf = Node(whole.cut(matched, whole.tokens), node, next(self._ticks))
        node.children[leaf.key.head(self._page) if leaf.key else ()] = leaf
        self.tokens += fresh
        self._nodes += 1
        self._offer(leaf)
        return leaf, fresh

    def lock(self, node: Node) -> None:
        above: Node | None = node
        while above is not None:
            if above.locks == 0:
                self.protected += above.tokens
            above.locks += 1
            above = above.parent

    def unlock(self, node: Node) -> None:
        above: Node | None = node
        while above is not None:
            above.locks -= 1
            if above.locks == 0:
                self.protected -= above.tokens
                self._offer(above)
            above = above.parent

    def evict(self, tokens: int) -> int:
        """Give up cold leaves until `tokens` are free; answers how many were given up."""
        freed = 0
        while freed < tokens and self._cold:
            used, _, node = heapq.heappop(self._cold)
            if used == node.used and self._is_cold(node):
                freed += node.tokens
                self._remove(node)
        self.tokens -= freed
        return freed

    def _root(self, space: str, prompt: Prompt) -> Node:
        return self._roots.setdefault((space, type(prompt).__name__), Node(None, None, 0))

    def _aligned(self, tokens: int) -> int:
        return tokens - tokens % self._page

    def _split(self, node: Node, at: int) -> Node:
        """The lower part stays the same object: requests hold references to it."""
        key, parent = node.key, node.parent
        if key is None or parent is None:
            raise AssertionError("a root has no edge to split")
        upper = Node(key.cut(0, at), parent, node.used)
        upper.locks = node.locks
        parent.children[key.head(self._page)] = upper
        node.key = key.cut(at, node.tokens)
        node.tokens -= at
        node.parent = upper
        self._nodes += 1
        upper.children[node.key.head(self._page)] = node
        return upper

    def _touch(self, node: Node) -> None:
        node.used = next(self._ticks)
        self._offer(node)

    def _is_cold(self, node: Node) -> bool:
        return node.alive and node.locks == 0 and not node.children and node.parent is not None

    def _offer(self, node: Node) -> None:
        if not self._is_cold(node):
            return
        heapq.heappush(self._cold, (node.used, next(self._pushes), node))
        if len(self._cold) > 1024 + 2 * self._nodes:
            self._cold = [it for it in self._cold if it[0] == it[2].used and self._is_cold(it[2])]
            heapq.heapify(self._cold)

    def _remove(self, node: Node) -> None:
        node.alive = False
        self._nodes -= 1
        if node.parent is not None and node.key is not None:
            del node.parent.children[node.key.head(self._page)]
            self._offer(node.parent)
