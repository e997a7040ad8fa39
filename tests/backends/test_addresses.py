"""Spellings of a host: all of them lead to it, and no two are alike."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.addresses import canonical, respelled

HOSTS = ("10.0.0.1", "255.255.255.255", "2001:db8::1", "[fe80::1]", "prefill-0.fleet.svc", "GPU7")
addresses = st.ip_addresses().map(str)
numbers = st.integers(0, 10_000)


@pytest.mark.parametrize("host", HOSTS)
def test_the_first_is_as_it_was_given_and_many_follow(host: str) -> None:
    spelled = [respelled(host, number) for number in range(8)]
    assert spelled[0] == host
    assert len(set(spelled)) == 8


@given(host=st.one_of(addresses, st.sampled_from(HOSTS)), number=numbers)
def test_every_spelling_means_the_same_host(host: str, number: int) -> None:
    assert canonical(respelled(host, number)) == canonical(host)


@given(host=st.ip_addresses(v=4).map(str), number=numbers)
def test_the_resolver_reads_every_spelling_of_a_numeric_address(host: str, number: int) -> None:
    told = socket.getaddrinfo(respelled(host, number), 80, socket.AF_INET, socket.SOCK_STREAM)
    assert told[0][4][0] == host


@given(host=st.ip_addresses(v=6), number=numbers)
def test_the_resolver_reads_every_spelling_of_a_long_address(
    host: ipaddress.IPv6Address, number: int
) -> None:
    assert socket.inet_pton(socket.AF_INET6, respelled(str(host), number)) == host.packed


def test_brackets_stay_and_the_end_of_a_name_stays() -> None:
    assert respelled("[fe80::1]", 1) == "[fe80:0:0:0:0:0:0:0001]"
    assert respelled("prefill-0.fleet.svc", 65535).endswith("et.svc")


@pytest.mark.parametrize("host", ["localhost", "LocalHost", "::1", "[::1]", "127.1", "127.0.0.0x1"])
def test_this_machine_has_many_names(host: str) -> None:
    assert canonical(host) == "127.0.0.1"


def test_an_address_that_is_good_on_one_link_only_stays_as_it_is() -> None:
    assert respelled("fe80::1%eth0", 5) == "fe80::1%eth0"
