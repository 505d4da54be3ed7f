//! What a back-end program has around it besides its vhost-user socket: `channel` to the host, and what the agent does to the
//! system for it, in namespaces of their own (`isolated`).

#[cfg(test)]
#[path = "surroundings/channel.rs"]
mod channel;
#[cfg(test)]
#[path = "surroundings/isolated.rs"]
mod isolated;
