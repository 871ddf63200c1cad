"""The page that the server shows at `/`: HTML, style and script, which are sent as they are. There is no code here."""
