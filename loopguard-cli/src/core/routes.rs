//! Decides by a request's route whether its blocks are told, and from which length on.

use super::event::{Owner, RequestFacts};

/// Routes are templates (`/items/{id}`), or paths where a framework keeps no templates. A pattern may end in `*`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteRules {
    /// Blocks of these are counted, but not told.
    pub excluded: Vec<String>,
    /// Thresholds of their own, in nanoseconds; the first that matches counts.
    pub thresholds: Vec<(String, u64)>,
}

impl RouteRules {
    pub fn excludes(&self, owner: &Owner) -> bool {
        request(owner).is_some_and(|request| self.excluded.iter().any(|pattern| matches(pattern, request)))
    }

    /// `None`: the loop's.
    pub fn threshold_ns(&self, owner: &Owner) -> Option<u64> {
        let request = request(owner)?;
        self.thresholds.iter().find(|(pattern, _)| matches(pattern, request)).map(|(_, ns)| *ns)
    }

    /// The lowest of all.
    pub fn lowest_ns(&self) -> Option<u64> {
        self.thresholds.iter().map(|(_, ns)| *ns).min()
    }
}

fn request(owner: &Owner) -> Option<&RequestFacts> {
    match owner {
        Owner::Request { request, .. } => Some(request),
        Owner::NoRequest { .. } | Owner::Task { .. } | Owner::Unknown(_) => None,
    }
}

fn matches(pattern: &str, request: &RequestFacts) -> bool {
    let names = [request.route.as_deref(), Some(request.path.as_str())];
    names.into_iter().flatten().any(|name| match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == pattern,
    })
}

#[cfg(test)]
mod tests {
    use super::super::event::{Event, StepMarks};
    use super::super::profile::Settings;
    use super::super::story::{check_with, events, ms, owner, sample, settings, step};
    use super::*;

    #[test]
    fn patterns() {
        let rules = |pattern: &str| RouteRules { excluded: vec![pattern.to_owned()], ..RouteRules::default() };
        let Owner::Request { request, how } = owner("items/7") else { unreachable!() };
        let request = RequestFacts { route: Some("/items/{id}".to_owned()), ..(*request).clone() };
        let owner = Owner::Request { request: request.into(), how };
        for (pattern, expected) in
            [("/items/{id}", true), ("/items/7", true), ("/items/*", true), ("/items", false), ("*", true), ("", false)]
        {
            assert_eq!(rules(pattern).excludes(&owner), expected, "{pattern}");
        }
        assert!(!rules("*").excludes(&Owner::NoRequest { task: None }));
    }

    fn with(routes: RouteRules) -> Settings {
        Settings { routes, ..settings(10) }
    }

    #[test]
    fn an_excluded_routes_block_is_counted_and_not_told() {
        let rules = RouteRules { excluded: vec!["/health".to_owned()], ..RouteRules::default() };
        let events: [Event; 4] = events![sample(1, 5, "health"), step(1, 0..30), sample(2, 35, "A"), step(2, 30..60)];
        let profile = check_with(with(rules), StepMarks::Exact, events, &["30..60 A Exact | Code 30+0+0+0"]);
        let summary = profile.summary(&Default::default());
        assert_eq!((summary.total.blocks, summary.excluded.blocks, summary.excluded.blocked_ns), (1, 1, ms(30)));
    }

    #[test]
    fn a_route_can_have_a_threshold_of_its_own() {
        let thresholds = vec![("/slow".to_owned(), ms(50)), ("/fast*".to_owned(), ms(5))];
        let rules = RouteRules { thresholds, ..RouteRules::default() };
        assert_eq!(rules.lowest_ns(), Some(ms(5)));
        check_with(
            with(rules),
            StepMarks::Exact,
            events![
                sample(1, 5, "slow"),
                step(1, 0..30),
                sample(2, 35, "slow"),
                step(2, 30..90),
                sample(3, 92, "faster"),
                step(3, 90..96),
                sample(4, 100, "A"),
                step(4, 96..104),
            ],
            &["30..90 slow Exact | Code 60+0+0+0", "90..96 faster Exact | Code 6+0+0+0"],
        );
    }
}
