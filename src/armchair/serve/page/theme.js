// Before anything is painted, so that the page does not flash in the other theme.
try {
  const theme = localStorage.getItem("armchair-theme");
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
} catch { /* storage may be forbidden: the system's theme it is */ }
