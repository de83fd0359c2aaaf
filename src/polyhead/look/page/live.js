// What the page does while a server answers: nothing yet.
