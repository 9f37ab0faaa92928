"""The OpenAI-compatible front door: picks a prefill and a decode server for each request, survives their failures."""

from pdtransport.router.server import Router
from pdtransport.router.settings import EndpointSettings, RouterSettings

__all__ = ["EndpointSettings", "Router", "RouterSettings"]
