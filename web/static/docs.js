// The API document as a page to try it out on, with the server that the page came from.

const spec = await (await fetch("/openapi.json")).json();
spec.servers = [{ url: "/" }];
SwaggerUIBundle({ spec, domNode: document.getElementById("docs"), deepLinking: true, validatorUrl: null });
