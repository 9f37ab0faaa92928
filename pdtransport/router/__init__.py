"""OpenAI-compatible front door: picks a prefill and a decode server for each request and survives server failures."""

from pdtransport.router.server import Router
from pdtransport.router.settings import EndpointSettings, RouterSettings

__all__ = ["EndpointSettings", "Router", "RouterSettings"]
