// Before anything is drawn: light or dark, as somebody chose, or else as the system is.
{
  const chosen = localStorage.getItem("npgpt2.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
