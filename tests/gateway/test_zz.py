from tests.gateway.gateway_under_test import *
async def test_one():
    async with standing() as site:
        for raw in [b"GARBAGE\r\n\r\n", b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nabc", b"GET / HTTP/1.1\r\nbad header\r\n\r\n", b"GET /%s HTTP/1.1\r\n\r\n" % (b"a"*20000), b"GET /health HTTP/1.1\r\nhost: x\r\nx-a: %s\r\n\r\n" % (b"a"*20000), b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-encoding: gzip\r\ncontent-length: 5\r\n\r\nabcde"
        , b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\nabcde", b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\nabcde"]:
            c = await RawClient.connect(site)
            c.say(raw)
            try:
                print("RAW", raw[:60], (await c.rest(40)), site.now_s(), site.complaints)
            except TimeoutError: print("TIMEOUT", raw[:60])
            site.complaints.clear()
