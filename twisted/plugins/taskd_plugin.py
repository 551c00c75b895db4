"""Tell twistd that ``twistd taskd`` exists, and where it lives."""

from twisted.application.service import ServiceMaker

taskd = ServiceMaker(
    "taskd",
    "taskd.tap",
    "A pool of worker processes that runs tasks, asked by one line of JSON.",
    "taskd",
)

taskd_gateway = ServiceMaker(
    "taskd-gateway",
    "taskd.gateway.tap",
    "The way from the browser to taskd: WebSocket, HTTP, and a page that shows its workers.",
    "taskd-gateway",
)
