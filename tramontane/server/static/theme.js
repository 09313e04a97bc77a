// Applies the chosen theme before the first paint; a module would run after it and flash.
// Without a choice the page follows the system.
(() => {
  try {
    const theme = localStorage.getItem("tramontane.theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // Storage is switched off: the system's theme it is.
  }
})();
