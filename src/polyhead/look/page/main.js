window.polyhead.show(JSON.parse(document.getElementById("data").textContent));
