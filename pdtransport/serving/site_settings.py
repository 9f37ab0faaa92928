"""Types and help texts of settings about host names and web pages.

:mod:`pdtransport.serving.cross_site` explains what they protect against.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

HostName = Annotated[str, Field(pattern=r"^(\*|[A-Za-z0-9_.-]{1,253})$")]
Origin = Annotated[str, Field(pattern=r"^(\*|https?://[A-Za-z0-9_.:\[\]-]{1,300})$")]

HOSTS_HELP = (
    "Further host names by which clients on this machine (such as a local proxy) reach the server, besides addresses, "
    "localhost and the machine's own name. Requests over loopback with other names in Host are refused, since a web "
    "page may have made such a name resolve to this machine. *: any name."
)
ORIGINS_HELP = (
    "Web pages that may use {paths} from a browser (CORS), each as https://HOST[:PORT], or * for all. Default: none."
)
