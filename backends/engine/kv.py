"""Who holds KV memory: live requests hold pages, the prefix cache holds what they left."""

from __future__ import annotations

from backends.engine.prompts import Prompt
from backends.engine.radix import Node, PrefixCache


class KvPool:
    """Tokens in whole pages; free + held + cached is always the capacity."""

    def __init__(self, *, capacity: int, page: int, caching: bool) -> None:
        self.page = page
        self.capacity = capacity - capacity % page
        self.caching = caching
        self.cache = PrefixCache(page)
        self.held = 0

    @property
    def available(self) -> int:
        """What a request could get, cold prefixes given up."""
        return self.capacity - self.held - self.cache.protected

    @property
    def used(self) -> int:
        """As SGLang reports it: cold prefixes do not count."""
        return self.held + self.cache.protected

    def pages(self, tokens: int) -> int:
        """Tokens rounded up to whole pages."""
        return -(-tokens // self.page) * self.page

    def whole(self, tokens: int) -> int:
        """Tokens rounded down to whole pages."""
        return tokens - tokens % self.page

    def take(self, tokens: int) -> bool:
        if tokens > self.available:
            return False
        short = tokens - (self.capacity - self.held - self.cache.tokens)
        if short > 0:
            self.cache.evict(short)
        self.held += tokens
        return True

    def give(self, tokens: int) -> None:
        self.held -= tokens

    def match(self, space: str, prompt: Prompt, limit: int) -> tuple[Node | None, int]:
        if not self.caching:
            return None, 0
        return self.cache.match(space, prompt, limit)

    def store(self, space: str, prompt: Prompt, held: int) -> Node:
        """Turn `held` tokens of a request into cached ones; what was cached already comes free."""
        self.held -= held
        node, _ = self.cache.insert(space, prompt)
        return node

    def clear(self) -> None:
        self.cache.clear()
        self.held = 0
