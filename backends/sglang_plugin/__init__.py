"""A plug-in for SGLang's own door (`sglang.srt.plugins`): nothing happens unless it is named.

`SGLANG_PLUGINS=slackwater` loads it; docs/engine-plugin.md says what it then does to a server.
"""

from __future__ import annotations

from backends.sglang_plugin.door import register

__all__ = ["register"]
