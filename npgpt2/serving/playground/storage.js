// What the browser keeps for the page: for all tabs, until it is deleted, or for this tab, until it is closed.

// full: called where there is no room, or the browser keeps nothing; the page goes on without
export const problems = { full: () => {} };

function keeper(name) {
  const tried = action => {
    try {
      return action(window[name]);
    } catch {
      problems.full();
      return undefined;
    }
  };
  return {
    get: key => tried(storage => storage.getItem(key)) ?? null,
    /** What a value says as JSON; null where it says nothing. */
    json: key => {
      const text = tried(storage => storage.getItem(key)) ?? "null";
      try {
        return JSON.parse(text);
      } catch {
        return null;
      }
    },
    /** Whether it is kept now. */
    set: (key, value) => tried(storage => storage.setItem(key, value) ?? true) ?? false,
    remove: key => tried(storage => storage.removeItem(key)),
  };
}

export const lasting = keeper("localStorage"), ofTab = keeper("sessionStorage");
