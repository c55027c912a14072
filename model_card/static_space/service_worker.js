// Keeps the page itself for a visit without a network; the model and the library are kept by worker.js.
const KEPT = `fledge page ${registration.scope}`;
const FILES = ["./", "style.css", "app.js", "worker.js", "icon.svg"];

addEventListener("install", (event) => {
  skipWaiting();
  event.waitUntil(caches.open(KEPT).then((cache) => cache.addAll(FILES)));
});
addEventListener("activate", (event) => event.waitUntil(clients.claim()));
addEventListener("fetch", (event) => {
  const url = event.request.url.split(/[?#]/)[0].replace(/index\.html$/, "");
  if (!FILES.some((file) => new URL(file, registration.scope).href === url)) return;
  event.respondWith(
    fetch(event.request).then(
      async (response) => {
        if (response.ok) await (await caches.open(KEPT)).put(url, response.clone());
        return response;
      },
      async (error) => {
        const kept = await caches.match(url, { cacheName: KEPT });
        if (kept) return kept;
        throw error;
      },
    ),
  );
});
